"""Ask for conversations whose turns switch between thinking and not; write them with /think and /no_think.

python data_gen/mode_switch.py pipeline=./mine.yaml stage=switching
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("mode_switch")
