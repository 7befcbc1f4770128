"""One file a DVC stage; stages meet only through files."""
