"""Makes and reads parameters as DTensors over the tp mesh."""

from autotp.rewrite.parameters.dtensor_operators.dispatch import operate
from autotp.rewrite.parameters.numbers import Numbers

# Tensors run operators, and operators make tensors: neither module imports the other, and the two meet here. Whoever imports a module of
# this package imports the package first, so no tensor is made before.
Numbers.operate = staticmethod(operate)
