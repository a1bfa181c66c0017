"""LoRA adapters as parametric memory: checked folders, a registry with owners and versions, distillation.

Knows neither vLLM nor HTTP; ``integration.adapter_gate`` brings an adapter into a request.
"""
