"""Pretrained models of other libraries, to and from directories of this one."""
