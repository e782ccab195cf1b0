"""Each promise about speed: see README.md. (A package, for some libraries install one of the same name.)"""
