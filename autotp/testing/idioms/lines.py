"""Lists what may happen to values `h` of shape [2, 6, w] between two weights: lines of Python by name, each with a kind.

`$g` groups of `$d` entries are the width `$w`. A template leaves the shape as it was, for every g ≥ 1 and d ≥ 1, has finite values
and gradients, and draws nothing. Indices need not fit a rank's part.
"""

from __future__ import annotations

_STATISTICS = {
    "rms": "y = y * torch.rsqrt(y.pow(2).mean({n}, keepdim=True) + 1e-3)",
    "rms_norm": "y = F.rms_norm(y, y.shape[-1:], eps=1e-3)",
    "layer_norm": "y = F.layer_norm(y, y.shape[-1:], eps=1e-1)",
    "norm": "y = y / (1 + y.norm(dim={n}, keepdim=True))",
    "vector_norm": "y = y / (1 + torch.linalg.vector_norm(y, ord=1, dim={n}, keepdim=True))",
    "std": "y = y * (1 + (y.var({n}, keepdim=True, unbiased=False) + 1e-2).sqrt())",
    "var": "y = y * y.var({n}, keepdim=True, correction=0)",
    "var_mean": "v, m = torch.var_mean(y, {n}, correction=0, keepdim=True)\ny = (y - m) / (1 + v)",
    "std_mean": "s, m = torch.std_mean(torch.cat([y, y + 1], {n}), {n}, keepdim=True)\ny = (y - m) / (1 + s)",
    "mean": "y = y - y.mean({n}, keepdim=True)",
    "sum": "y = y * y.sum({n}, keepdim=True)",
    "softmax": "y = y.softmax({n})",
    "log_softmax": "y = F.log_softmax(y, {n})",
    "logsumexp": "y = y - y.logsumexp({n}, keepdim=True)",
    "max": "y = y - y.max({n}, keepdim=True).values",
    "amax": "y = y / (1 + y.abs().amax({n}, keepdim=True))",
    "normalize": "y = F.normalize(y + 0.1, dim={n})",
    "group_cumsum": "y = y.cumsum({n})",
    "group_sort": "y = y.sort({n}).values",
    "group_flip": "y = y.flip({n})",
    "group_prod": "y = y * (1 + 0.1 * y.tanh()).prod({n}, keepdim=True)",
}
#: How the groups are made; g groups of d, or d of g where they are transposed.
_VIEWS = {
    "counted": "y = h.view(2, 6, $g, -1)",
    "sized": "y = h.view(*h.shape[:-1], -1, $d)",
    "unflatten": "y = h.unflatten(-1, ($g, $d))",
    "divided": "y = h.reshape(h.shape[0], h.shape[1], $g, h.size(-1) // $g)",
    "transposed": "y = h.view(2, 6, $g, $d).transpose(-1, -2)",
    "heads_first": "y = h.view(2, 6, -1, $d).transpose(1, 2)",
}
_BACK = {"transposed": "h = y.transpose(-1, -2).flatten(-2)", "heads_first": "h = y.transpose(1, 2).reshape(2, 6, -1)"}

STATISTICS = {
    f"{name}_{view}{'' if at == '-1' else '_across'}": f"{made}\n{line.format(n=at)}\n{_BACK.get(view, 'h = y.flatten(-2)')}"
    for name, line in _STATISTICS.items()
    for view, made in _VIEWS.items()
    for at in (("-1", "-2") if "{n}" in line and view in ("counted", "sized") else ("-1",))
}

COMPOSITES = {
    "adaptive_avg_pool1d": "h = h * F.adaptive_avg_pool1d(h, 1)",
    "adaptive_avg_pool1d_2": "h = h + F.adaptive_avg_pool1d(h, 2).sum(-1, keepdim=True)",
    "adaptive_max_pool1d": "h = h - F.adaptive_max_pool1d(h, 1)",
    "adaptive_pool_over_time": "h = h - F.adaptive_avg_pool1d(h.transpose(1, 2), 1).transpose(1, 2)",
    "avg_pool1d": "h = h + F.avg_pool1d(h, 3, 1, 1)",
    "max_pool1d": "h = h + F.max_pool1d(h, 3, 1, 1)",
    "matrix_norm": "h = h / (1 + torch.linalg.matrix_norm(h, keepdim=True))",
    "frobenius": "h = h / (1 + h.norm())",
    "cosine_similarity": "h = h * F.cosine_similarity(h, h.roll(1, 1) + 0.1, dim=-1)[..., None]",
    "cosine_over_time": "h = h * F.cosine_similarity(h, h.flip(-1) + 0.1, dim=1)[:, None]",
    "pairwise_distance": "h = h * F.pairwise_distance(h, h.roll(1, 1), keepdim=True)",
    "cdist": "h = torch.cdist(h, h.roll(1, 1) + 0.1) @ h",
    "kl_div": "h = h * F.kl_div(h.log_softmax(-1), h.roll(1, 1).softmax(-1), reduction='batchmean')",
    "kl_div_sum": "h = h * F.kl_div(h.log_softmax(1), h.roll(1, 1).softmax(1), reduction='sum')",
    "mse_loss": "h = h * F.mse_loss(h, h.roll(1, 1))",
    "smooth_l1": "h = h * F.smooth_l1_loss(h, h.roll(1, 1), reduction='none').mean(-1, keepdim=True)",
    "bce": "h = h * F.binary_cross_entropy_with_logits(h, h.sigmoid().detach())",
    "cross_entropy": "h = h * F.cross_entropy(h.flatten(0, 1), torch.arange(12) % $w)",
    "nll": "h = h - F.nll_loss(h.log_softmax(-1).flatten(0, 1), torch.arange(12) % $w)",
    "cosine_embedding_loss": "y = h.flatten(0, 1)\nh = h * F.cosine_embedding_loss(y, y.roll(1, 0) + 0.1, torch.ones(12, dtype=h.dtype))",
    "triplet": "h = h * F.triplet_margin_loss(h.flatten(0, 1), h.roll(1, 1).flatten(0, 1), h.roll(2, 1).flatten(0, 1), margin=5.0)",
    "group_norm": "h = F.group_norm(h.transpose(1, 2), $g, eps=1e-1).transpose(1, 2)",
    "instance_norm": "h = F.instance_norm(h.transpose(1, 2), eps=1e-1).transpose(1, 2)",
    "response_norm": "h = F.local_response_norm(h.transpose(1, 2), 3).transpose(1, 2)",
    "unfold": "h = h + F.pad(h, (1, 1)).unfold(-1, 3, 1).sum(-1)",
    "pad_and_cut": "h = F.pad(h, (2, 1))[..., 1:-2]",
    "interpolate": "h = F.interpolate(h, scale_factor=2)[..., ::2]",
    "bilinear": "h = F.bilinear(h, h, torch.ones($w, $w, $w, dtype=h.dtype) / 50)",
    "tensordot": "h = h + torch.tensordot(h, h[0, 0], 1)[..., None]",
    "einsum_heads": (
        "y = h.view(2, 6, $g, $d)\ns = torch.einsum('bngd,bmgd->bngm', y, y).softmax(-1)\n"
        "h = torch.einsum('bngm,bmgd->bngd', s, y).flatten(2)"
    ),
    "outer": "h = (h[..., None] * h[..., None, :]).sum(-1)",
    "glu": "h = F.glu(torch.cat([h, h.flip(-1)], -1), -1)",
    "lerp": "h = torch.lerp(h, h.mean(-1, keepdim=True), 0.3)",
    "covariance": "h = h + torch.cov(h.flatten(0, 1).T).sum(0)",
}

INDICES = {
    "scatter_short": "h = h.scatter(1, torch.zeros(2, 1, min(3, $w), dtype=torch.long), 0.5)",
    "scatter_add_short": "h = h.scatter_add(1, torch.zeros(2, 1, min(3, $w), dtype=torch.long), torch.ones(2, 1, $w, dtype=h.dtype))",
    "scatter_full": "h = h.scatter(1, torch.zeros(2, 6, $w, dtype=torch.long), h * 2)",
    "scatter_on_it": "h = h.scatter(-1, torch.arange($w).flip(0)[: ($w + 1) // 2].expand(2, 6, -1), 0.5)",
    "scatter_reduce": "i = torch.zeros(2, 1, min(3, $w), dtype=torch.long)\nh = h.scatter_reduce(1, i, torch.ones_like(h), 'sum')",
    "gather_short": "h = h + h.gather(1, torch.ones(2, 1, min(3, $w), dtype=torch.long)).sum(-1, keepdim=True)",
    "gather_full": "h = h + h.gather(1, torch.ones(2, 1, $w, dtype=torch.long))",
    "gather_on_it": "h = h.gather(-1, torch.arange($w).flip(0).expand(2, 6, -1))",
    "take_along_dim": "h = torch.take_along_dim(h, h.argsort(-1), -1)",
    "take_along_rows": "h = torch.take_along_dim(h, torch.arange(6).flip(0)[None, :, None], 1)",
    "index_add": "h = h.index_add(-1, torch.arange(min(3, $w)), h[..., : min(3, $w)])",
    "index_add_rows": "h = h.index_add(1, torch.tensor([2, 0]), h[:, :2])",
    "index_copy": "h = h.index_copy(-1, torch.arange(min(3, $w)), h[..., -min(3, $w) :])",
    "index_copy_rows": "h = h.index_copy(1, torch.tensor([2, 0]), 2 * h[:, :2])",
    "index_fill": "h = h.index_fill(-1, torch.tensor([0]), 0.5)",
    "index_select": "h = h.index_select(-1, torch.arange($w).flip(0))",
    "index_select_rows": "h = h.index_select(1, torch.tensor([2, 0, 1, 5, 4, 3]))",
    "index_put": "h = h.index_put((torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0, $w - 1])), h.new_ones(2))",
    "index_put_rows": "h = h.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), h.new_ones(()))",
    "masked_fill": "h = h.masked_fill(torch.arange($w) % 3 == 0, 0.5)",
    "masked_rows": "h = h.masked_fill((torch.arange(6) % 3 == 0)[:, None], 0.5)",
    "narrow": "h = torch.cat([h.narrow(-1, $w // 2, $w - $w // 2), h.narrow(-1, 0, $w // 2)], -1)",
    "first": "h = h * h[..., :1]",
    "last_row": "h = h * h[:, -1:]",
    "every_other": "h = torch.cat([h[..., ::2], h[..., 1::2]], -1)",
    "roll": "h = h.roll(1, -1)",
    "roll_rows": "h = h.roll(1, 1)",
    "roll_all": "h = h.roll(1)",
    "flip": "h = h.flip(-1)",
    "topk": "h = h * h.topk(1, -1).values",
    "sort": "h = h.sort(-1).values",
    "cumsum": "h = h.cumsum(-1)",
    "cumsum_rows": "h = h.cumsum(1)",
    "tril": "h = h.tril()",
    "diagonal": "h = h + h.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]",
    "one_hot": "h = h * F.one_hot(h.argmax(-1), $w)",
    "where": "h = torch.where(h > h.mean(-1, keepdim=True), h, 0.1 * h)",
}

IN_PLACE = {
    "relu_": "h = F.relu(h, inplace=True)",
    "mul_": "h *= 2",
    "add_": "h.add_(h.tanh().detach())",
    "set_row": "h[:, 0] = 0",
    "set_entry": "h[..., 0] = 0.5",
    "set_half": "h[..., : $w // 2] *= 2",
    "clamp_of_a_view": "h.view(2, 6, $g, $d).clamp_(-0.5, 0.5)",
    "clamp_of_a_part": "h[..., 1:].clamp_(-0.5, 0.5)",
    "masked_fill_": "h.masked_fill_(h < -0.5, 0.0)",
    "copy_": "h.copy_(h.detach().softmax(-1) + h)",
    "zero_of_a_part": "h.narrow(-1, 0, $w // 2).zero_()",
    "out": "h = torch.add(h, 1).sub_(0.5)",
}

#: What any plan can shard: with these what is around decides.
PLAIN = {
    "tanh": "h = torch.tanh(h)",
    "gelu": "h = F.gelu(h)",
    "gate": "h = h.sigmoid() * h",
    "power": "h = h.pow(2) - 0.5 * h",
    "dropped": "h = F.dropout(h, 0.0, self.training)",
    "cumsum_over_time": "h = h.cumsum(1)",
    "flip_over_time": "h = h.flip(1)",
    "mean_over_time": "h = h - h.mean(1, keepdim=True)",
    "clone": "h = h.clone(memory_format=torch.contiguous_format)",
}

FORMS = {
    "loop": "h = torch.cat([y * (i + 1) for i, y in enumerate(h.view(2, 6, $g, $d).unbind(2))], -1)",
    "loop_of_chunks": "h = torch.cat([y.softmax(-1) for y in h.split($d, -1)], -1)",
    "stack": "h = torch.stack([y.softmax(-1) for y in h.view(2, 6, $g, $d).unbind(2)], 2).flatten(2)",
    "len": "h = h / len(h.view(2, 6, $g, $d).unbind(2))",
    "root": "h = h * h.shape[-1] ** -0.5",
    "math_root": "h = h / math.sqrt(h.size(-1))",
    "mean_by_hand": "h = h - h.sum(-1, keepdim=True) / h.shape[-1]",
    "count": "h = h / h.numel()",
    "halves": "h = torch.cat(h.chunk(2, -1)[::-1], -1)",
    "repeat": "h = h.repeat(1, 1, 2)[..., $w :]",
    "repeat_interleave": "h = h.repeat_interleave(2, -1)[..., ::2]",
    "expand": "h = h[:, :1].expand(-1, 6, -1) * h",
    "expand_heads": "h = (h.view(2, 6, $g, $d) * h.view(2, 6, $g, $d)[:, :, :1].expand(-1, -1, $g, -1)).flatten(2)",
    "scaled": "h = 0.5 * h",
    "arange": "h = h * torch.arange(h.shape[-1], dtype=h.dtype)",
    "new_ones": "h = h + h.new_ones(h.shape[-1]).cumsum(0)",
    "branch": "h = h.relu() if h.shape[-1] == $w else h - 1",
    "transpose": "h = h.view(2, 6, $g, $d).transpose(2, 3).flatten(2)",
    "permute": "h = h.permute(2, 0, 1).contiguous().permute(1, 2, 0)",
    "flat_and_back": "h = h.reshape(2, -1).tanh().view(2, 6, -1)",
    "wrong_view": "h = h.reshape(2, $w, 6).softmax(1).reshape(2, 6, $w)",
    "matmul_itself": "h = (h @ h.transpose(1, 2)).softmax(-1) @ h",
    "gram": "h = h @ (h.transpose(1, 2) @ h).softmax(-1)",
    "float_number": "h = h * float(h.shape[-1])",
    "complex": "y = torch.fft.rfft(h, dim=1)\nh = torch.fft.irfft(y, n=6, dim=1)",
    "fft": "h = torch.fft.fft(h, dim=-1).real",
    "total": "h = h - h.mean()",
    "axes": "h = h - h.mean((0, 2), keepdim=True)",
}

GRADIENTS = {
    "elementwise_function": "h = Elementwise.apply(h)",
    "mixing_function": "h = Mixing.apply(h)",
    "flipping_function": "h = Flipping.apply(h)",
    "group_function": "h = Mixing.apply(h.view(2, 6, $g, $d)).flatten(2)",
    "tensor_hook": "if h.requires_grad:\n    h.register_hook(lambda g: g.clamp(-0.02, 0.02))",
    "mixing_hook": "if h.requires_grad:\n    h.register_hook(lambda g: g - g.mean(-1, keepdim=True))\nh = h * 1",
    "asks_grad": "h = h.softmax(-1) if torch.is_grad_enabled() else h.tanh()",
    "asks_requires": "h = h.tanh() if h.requires_grad else h.softmax(-1)",
    "asks_training": "h = h.softmax(-1) if self.training else h",
    "no_grad": "with torch.no_grad():\n    s = h.abs().amax(-1, keepdim=True)\nh = h / (1 + s)",
    "detached": "h = h + (h.softmax(-1) - h).detach()",
    "checkpointed": "h = checkpoint(lambda h: h.softmax(-1) * h, h, use_reentrant=False)",
    "checkpointed_norm": "h = checkpoint(lambda h: h / (1 + h.norm(dim=-1, keepdim=True)), h, use_reentrant=False)",
    "checkpointed_reentrant": "h = checkpoint(lambda h: F.gelu(h) * h, h, use_reentrant=True)",
}

#: Another path where data say so (a further call has such data), or a class; or an error that never comes.
CONDITIONS = {
    "asks_any": "h = (h / 1e6).softmax(-1) * h if bool((h.detach().abs() > 1e4).any()) else h",
    "asks_all": "if not (h.detach().abs() < 1e4).all():\n    h = h - h.mean(-1, keepdim=True)",
    "raises": "if not h.isfinite().all():\n    raise ValueError('h')",
    "asks_class": "h = h.tanh() if type(self) is Part else h.softmax(-1)",
    "asks_item": "h = h.flip(-1) if x.abs().max().item() > 1e4 else h.tanh()",
}

#: Need the library.
EINOPS = {
    "einops_groups": "h = einops.rearrange(einops.rearrange(h, 'b t (g d) -> b g t d', g=$g).softmax(-1), 'b g t d -> b t (g d)')",
    "einops_sizes": "h = einops.rearrange(einops.rearrange(h, 'b t (g d) -> b t g d', d=$d).tanh(), 'b t g d -> b t (g d)')",
    "einops_swapped": "h = einops.rearrange(einops.rearrange(h, 'b t (g d) -> b t d g', g=$g), 'b t d g -> b t (d g)')",
    "einops_mean": "h = h - einops.repeat(einops.reduce(h, 'b t (g d) -> b t g', 'mean', g=$g), 'b t g -> b t (g d)', d=$d)",
    "einops_sum": "h = h * einops.reduce(h, 'b t (g d) -> b t 1', 'sum', d=$d)",
    "einops_einsum": "h = einops.einsum(h.softmax(-1), h, h, 'b t w, b s w, b s v -> b t v')",
}

#: Numbers that code makes of lengths and of what may be local.
NUMBERS = {
    "longer_than_groups": "h = h.tanh() if h.shape[1] > self.groups else h.flip(-1)",
    "padded_to_groups": "h = F.pad(h, (0, 0, 0, -h.shape[1] % self.groups))[:, : h.shape[1]] + h.view(2, 6, self.groups, -1).flatten(2)",
    "groups_of_a_dict": "h = h.view(2, 6, self.sizes['groups'], self.sizes['size']).softmax(-1).flatten(2)",
    "groups_of_a_partial": "h = self.grouped(h).softmax(-1).flatten(2)",
    "groups_by_division": "h = h.view(2, 6, int(h.shape[-1] / self.sizes['size']), -1).softmax(-1).flatten(2)",
    "kept_of_groups": "h = h[:, : max(1, min(self.groups, h.shape[1]))].mean(1, keepdim=True) + h.view(2, 6, self.groups, -1).flatten(2)",
}

KINDS = {
    "plain": PLAIN,
    "form": FORMS,
    "statistic": STATISTICS,
    "composite": COMPOSITES,
    "index": INDICES,
    "in_place": IN_PLACE,
    "gradient": GRADIENTS,
    "condition": CONDITIONS,
    "einops": EINOPS,
    "number": NUMBERS,
}
LINES = {name: text for table in KINDS.values() for name, text in table.items()}
