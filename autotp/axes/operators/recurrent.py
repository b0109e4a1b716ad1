"""The rule of recurrent layers."""

from __future__ import annotations

from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, rule
from autotp.trace.graph import Node


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", traits=Is.PRODUCT)
@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", traits=Is.PRODUCT)
def recurrent(context: Context, node: Node) -> None:
    """Cut hidden units would be gathered in each step. So the layer is whole, and its steps are not traced one by one."""
    context.opaque("each step of a recurrent layer needs all hidden units of the step before it")
