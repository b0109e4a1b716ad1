"""fair-esm: language models of proteins."""

from __future__ import annotations

from argparse import Namespace

import torch
from esm import Alphabet
from esm.model.esm1 import ProteinBertModel
from esm.model.esm2 import ESM2
from esm.model.msa_transformer import MSATransformer

from tools.libraries import Table, tokens


def alphabet(architecture: str) -> Alphabet:
    return Alphabet.from_architecture(architecture)


SIZES = {
    "layers": 2,
    "embed_dim": 64,
    "ffn_embed_dim": 128,
    "attention_heads": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_positions": 32,
    "emb_layer_norm_before": True,
    "token_dropout": False,
    "logit_bias": True,
    "max_tokens": 64,
    "embed_positions_msa": True,
    "max_tokens_per_msa": 1024,
}

MODELS: Table = {
    "esm2": lambda: (ESM2(num_layers=2, embed_dim=64, attention_heads=4), tokens(vocabulary=24)),
    "esm1b": lambda: (ProteinBertModel(Namespace(**SIZES, arch="roberta_large"), alphabet("ESM-1b")), tokens(vocabulary=24)),
    "msa": lambda: (
        MSATransformer(Namespace(**SIZES, arch="msa_transformer"), alphabet("msa_transformer")),
        (torch.randint(4, 24, (2, 3, 8)),),
    ),
}
