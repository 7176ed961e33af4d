from axolotl_reft.tuner.compat import check_versions

check_versions()
