"""The processes of Baton and what they share."""
