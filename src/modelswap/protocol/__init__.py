"""Plain data that the two services say to each other, and the words both use for failures."""
