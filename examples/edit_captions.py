"""Writes shards whose captions come from a column; the images stay bit for bit as they are.

    python examples/edit_captions.py DIR

DIR gets the shards, a pipeline of one stage, and the new shards.
"""

import subprocess
import sys
from pathlib import Path

from builder.demo.shards import make_demo_shards

folder = Path(sys.argv[1])
make_demo_shards(folder / "source", samples=40)  # or your own shards

# A pipeline of one stage, whose work SQL takes every sample whose caption has a letter.
(folder / "work.sql").write_text(r"""
    select shard, row, uid, caption as text from samples where regexp_matches(caption, '\pL')
""")
# What the writer changes: `caption` alone is a new caption, `set_<name>` a field of the json. Rows that are not
# returned are copied bit for bit.
(folder / "write.sql").write_text("""
    select shard, row, uid, prompt as caption, 'edit_captions.py' as set_edited_by
    from samples
    where prompt is not null and prompt <> caption
""")
(folder / "pipeline.toml").write_text(f"""
    [dataset]
    shards = "{folder}/source/*.tar"
    root   = "{folder}/out"

    [stages.prompts]
    sql   = "{folder}/work.sql"
    style = "{{caption}}"       # the tidied caption itself

    [write]
    select = "{folder}/write.sql"
""")

for command in ("run", "verify"):
    subprocess.run([sys.executable, "-m", "builder", command, "--pipeline", folder / "pipeline.toml"], check=True)
