"""What the ranks of a group compare, through the store of the group."""
