"""Merge checkpoints by one of mergekit's methods, or by its YAML file as it is, behind the checks of a linear merge.

python merge/method.py pipeline=tiny +schema@stages.slerp=mergekit stages.slerp.method=slerp stages.slerp.base=soup \
    +stages.slerp.inputs.soup={} +stages.slerp.inputs.long_context={} +stages.slerp.parameters.t=0.1 stage=slerp
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("mergekit")
