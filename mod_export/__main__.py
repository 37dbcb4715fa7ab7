"""`python -m mod_export` is `mod-export`."""

from mod_export.cli import main

main()
