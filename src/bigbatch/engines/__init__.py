"""Facts about a framework that more than one package uses, in files named after it; no window's loop is here."""
