"""Pure decisions over an immutable view: the same objects run in the scheduler and in a simulator."""
