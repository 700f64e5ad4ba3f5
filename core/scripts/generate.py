"""generate.py of this clone; a wheel has the script itself in this place."""

from . import of_clone

exec(of_clone("generate.py"))
