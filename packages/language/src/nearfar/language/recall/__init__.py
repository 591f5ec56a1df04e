"""How well sequence mixers recall what they have read."""
