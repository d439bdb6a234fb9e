"""Agreement between the ranks of a process group, through the group's store."""
