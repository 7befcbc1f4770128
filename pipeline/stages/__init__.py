"""One file a command that reads or writes what is on disk: DVC's stages, `plan` and `clean`. They meet only through files."""
