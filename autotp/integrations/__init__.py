"""What other libraries ask of a model is answered here for a parallel one."""

from autotp.api import ANSWERS
from autotp.integrations.accelerate import install_accelerate
from autotp.integrations.peft import install_adapters
from autotp.integrations.resizing import install_resizing
from autotp.integrations.transformers import install_answers

ANSWERS.extend((install_answers, install_accelerate, install_adapters, install_resizing))
