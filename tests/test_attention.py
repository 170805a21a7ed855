import torch

from aapa_lightning.attention import resolve_attention


def test_attention_auto_needs_gpu_half_precision_and_the_package(monkeypatch) -> None:
    import transformers.utils

    assert resolve_attention("auto", torch.float32) == "sdpa"
    assert resolve_attention("eager", torch.float32) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert resolve_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert resolve_attention("auto", torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert resolve_attention("auto", torch.bfloat16) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert resolve_attention("auto", torch.bfloat16) == "sdpa"
