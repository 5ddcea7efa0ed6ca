"""`baton bench kv`: how fast KV moves between two processes, beside memcpy, gRPC and Mooncake Store.

Every way moves the same bytes: one prompt's KV in pages of a layer group, written or sent in runs of
16 KiB to 16 MiB. Ways and run lengths take turns round by round, so that a drift of the machine meets
all of them alike, and every ratio is taken within its round. What exactly is timed stands with each
way; CPU seconds are those of all its processes together, read from their CPU clocks.
"""
