"""Dataset distillation and coreset selection for histopathology patches (Histo-DD, Cong et al., arXiv 2408.09709)."""

__version__ = "0.1.0"
