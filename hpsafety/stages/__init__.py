"""One file per stage; each is a command of its own."""
