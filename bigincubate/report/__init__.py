"""What a run came to, for people: a page of one run, a comparison of several. Reads run directories, changes none."""
