"""AAPA Lightning: adversarially anchored preference alignment for Lightning."""
