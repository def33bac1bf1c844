"""The command line: one small file a verb, each a thin layer over one public function of `bonetune`.

A package of its own, because importing `bonetune` registers with PEFT, which imports torch: seconds that `--help` has not got.
"""
