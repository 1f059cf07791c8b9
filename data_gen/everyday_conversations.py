"""Let a teacher write everyday conversations in six languages, the user's side in the role of a persona.

python data_gen/everyday_conversations.py pipeline=./mine.yaml stage=everyday
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("everyday_conversations")
