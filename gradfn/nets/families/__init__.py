"""The families of models that `gf.load_pretrained` reads: one file each, under their `model_type`."""

from collections.abc import Mapping

from gradfn.nets.families.family import Family
from gradfn.nets.families.gpt2 import GPT2
from gradfn.nets.families.llama import LLAMA

# In the order in which `gf.save_pretrained` tries them.
FAMILIES: Mapping[str, Family] = {family.name: family for family in (GPT2, LLAMA)}
