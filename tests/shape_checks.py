"""The type checker that jaxtyping's import hook puts on the package during tests."""

from beartype import BeartypeConf, beartype

# An int is a float here, as it is for every type checker and every user.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
