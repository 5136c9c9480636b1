"""One file per editing method; torch only, never Ray."""
