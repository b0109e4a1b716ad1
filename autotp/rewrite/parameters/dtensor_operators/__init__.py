"""Operators on tensors that are laid out over ranks give what they give on one device.

    on elements   add, mul, copy_, …: on the local parts; a whole tensor among the arguments is cut first
    counting      sums and norms: on what each rank owns, an index that several ranks hold once, padding never
    lists         foreach ones that work on each element, fused optimizers: on the local parts, where the lists go together;
                  norms: DTensor's own
    any other     on the whole tensors: parts are gathered, what is written goes back into the parts, views remember what they are of

A plain tensor among the arguments is whole. Results of the last kind are whole on every rank, and random numbers are rank 0's. Nothing
here is called in a forward, which reads local tensors.
"""
