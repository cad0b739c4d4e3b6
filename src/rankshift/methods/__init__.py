"""One paper per file. Importing this package fills the registry; read it to learn the field."""

from rankshift.core.method import Method, from_dict, methods, to_dict
from rankshift.methods.adarankgrad import AdaRankGrad
from rankshift.methods.flat_lora import FlatLoRA
from rankshift.methods.full import Full
from rankshift.methods.galore import GaLore
from rankshift.methods.lora import LoRA
from rankshift.methods.melora import MELoRA
from rankshift.methods.paca import PaCA
from rankshift.methods.pc_lora import PCLoRA
from rankshift.methods.prelora import PreLoRA
from rankshift.methods.relora import ReLoRA
from rankshift.methods.sora import SoRA
from rankshift.methods.switchlora import SwitchLoRA
from rankshift.methods.vera import VeRA

__all__ = [
    "AdaRankGrad",
    "FlatLoRA",
    "Full",
    "GaLore",
    "LoRA",
    "MELoRA",
    "Method",
    "PCLoRA",
    "PaCA",
    "PreLoRA",
    "ReLoRA",
    "SoRA",
    "SwitchLoRA",
    "VeRA",
    "from_dict",
    "methods",
    "to_dict",
]
