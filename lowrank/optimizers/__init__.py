"""Optimisers of adapters, among them those that step a pair A, B by what it does to ΔW = s·B·A."""
