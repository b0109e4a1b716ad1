"""What other libraries ask of a model is answered here for a parallel one."""

from autotp.api import ANSWERS
from autotp.integrations.transformers import install_answers

ANSWERS.append(install_answers)
