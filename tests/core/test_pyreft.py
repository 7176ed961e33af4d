"""What a user reads whose pyreft cannot be imported."""

import subprocess
import sys


def test_one_that_cannot_be_imported():
    code = (
        "import sys; sys.modules['pyreft'] = None\n"
        "import axolotl_reft\n"
        "try:\n    import axolotl_reft.core.interventions\n"
        "except ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "importing it failed" in done.stdout
    assert "pip install --no-deps pyreft==0.1.0" in done.stdout
