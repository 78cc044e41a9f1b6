"""`python -m ds_llm.config` prints the tables of docs/configuration.md."""

from ds_llm.config import options
from ds_llm.config.run import Config

if __name__ == "__main__":
    print(options.markdown(Config))
