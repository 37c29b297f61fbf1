"""What the command line offers by name, without what the names stand for: help is shown before PyTorch is imported."""

EMBEDDED = "smollm2"  # the target that comes with an extra, and its drafter, which is shipped
LOOKUP = "lookup"
DEFAULT_DRAFT = f"{LOOKUP}+{EMBEDDED}"
NAMED_POLICIES = ("adaptive", "hf-confidence", "hf-heuristic", "adaedl", "svip", "specdec++", "paper")
POLICIES = f"off, fixed:N with N draft tokens a step, or {', '.join(NAMED_POLICIES)}"
DEFAULT_POLICIES = ("off,fixed:1,fixed:2,fixed:3,fixed:4,fixed:6,fixed:8,paper,adaptive,hf-confidence,hf-heuristic,"
                    "adaedl,svip,specdec++")  # of a comparison
