"""What more than one room has to know about a framework, in files named after it; nothing of a window's loop."""
