# With this file the folder is a package, and no other one named data, installed or in the current folder, goes before it.
