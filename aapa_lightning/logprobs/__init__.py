"""Log-probabilities and entropies of tokens under a causal language model."""

from aapa_lightning.logprobs.head import set_logprob_backend
from aapa_lightning.logprobs.packing import set_packing
from aapa_lightning.logprobs.score import response_logprobs, sequence_logprobs
from aapa_lightning.logprobs.tokens import token_logprobs

__all__ = ["response_logprobs", "sequence_logprobs", "set_logprob_backend", "set_packing", "token_logprobs"]
