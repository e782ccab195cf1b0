"""The families of models that `gf.load_pretrained` reads: one file each, under their `model_type`."""

from collections.abc import Mapping

from gradfn.nets.families.family import Family
from gradfn.nets.families.gemma import GEMMA, GEMMA2, GEMMA3
from gradfn.nets.families.gpt2 import GPT2
from gradfn.nets.families.llama import LLAMA
from gradfn.nets.families.mistral import MISTRAL
from gradfn.nets.families.neox import GPT_NEOX
from gradfn.nets.families.qwen import QWEN2, QWEN3

# In the order in which `gf.save_pretrained` tries them.
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA, GEMMA2, GEMMA3, GPT_NEOX)
}
# Types that are known, and why they are not read.
REFUSED: Mapping[str, str] = {
    "gemma3": "a model of texts and images. Its texts alone are a model of type 'gemma3_text': save the language_model "
    "of transformers' Gemma3ForConditionalGeneration as a Gemma3ForCausalLM",
}
