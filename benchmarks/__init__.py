"""One file per benchmark or edit data set; `world/` is the built-in one. Never Ray."""
