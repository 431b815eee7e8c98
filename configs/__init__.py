"""System files, one per system: `<group>/<name>.py` with `get_config(variant="")` (docs/configs.md).

Installed as `genmodels.configs`; `genmodels systems` lists them.
"""
