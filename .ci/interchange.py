#!/usr/bin/env python3
"""Interchange with transformers' DeepseekV3ForCausalLM, both ways.

  python3 .ci/interchange.py [--moe ./moe]

Models trained here are opened there, random models saved there are opened here, and the logits of
both on one batch are compared: a line a case with the relative L2 error, at most 1e-5. Needs torch
and transformers (pip install torch transformers); where they are missing it says so and ends.
"""
import argparse, contextlib, glob, json, os, re, subprocess, sys, tempfile, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    import torch, transformers
    from safetensors.torch import load_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
except ImportError:
    print("skipped: torch and transformers are not installed")
    sys.exit(0)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "tinyshakespeare", "excerpt.txt")
B, T, TOLERANCE = 2, 48, 1e-5
BASE = dict(
    vocab_size=256, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1,
    intermediate_size=80, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8,
    num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24, n_group=1, topk_group=1,
    norm_topk_prob=True, routed_scaling_factor=1.5, num_nextn_predict_layers=0,
    max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
    initializer_range=0.1)
GROUPS = dict(n_group=4, topk_group=2)
YARN = dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16,
                              beta_fast=4.0, beta_slow=1.0, mscale=0.7, mscale_all_dim=1.0))
passed = failed = 0


def report(name, problem, error=None, note=""):
    global passed, failed
    passed, failed = passed + (not problem), failed + bool(problem)
    print("FAIL" if problem else "ok  ", name + ":", "" if error is None else f"{error:.1e}",
          problem or note, flush=True)


def moe(*words):
    return subprocess.run([args.moe, *map(str, words)], capture_output=True, text=True)


def must(result):
    if result.returncode:
        raise RuntimeError((result.stderr or result.stdout).strip()[-300:])


def logits_here(directory):
    dump = os.path.join(directory, "dump")  # no name that transformers would take for weights
    must(moe("check", "--model", directory, "--data", DATA, "--batch", B, "--seq", T,
             "--dump", dump))
    logits = load_file(dump)["logits"]
    os.remove(dump)
    return logits


@torch.no_grad()
def logits_there(model):
    with open(DATA, "rb") as f:  # as moe check: B rows of T + 1 tokens, the last of each a target
        tokens = torch.tensor(list(f.read(B * (T + 1)))).view(B, T + 1)
    return model.float().eval()(input_ids=tokens[:, :T], use_cache=False).logits


def relative(actual, expected):
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def over(error):
    return "" if error <= TOLERANCE else f"over {TOLERANCE:g}"


def open_there(directory):
    return DeepseekV3ForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True)


def trained_here(name, **changes):
    """Trained here, opened there; saved again there, opened here."""
    config = {**BASE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
              "mtp_loss_weight": 0.3, "aux_loss_alpha": 1e-3, **changes}
    with tempfile.TemporaryDirectory() as work:
        out, again = os.path.join(work, "model"), os.path.join(work, "again")
        path = os.path.join(work, "config.json")
        with open(path, "w") as f:
            json.dump(config, f)
        must(moe("train", "--config", path, "--data", DATA, "--out", out, "--steps", 20,
                 "--batch", 4, "--seq", 32, "--bias-speed", 0.02, "--tokens", 0))
        model, info = open_there(out)
        number = re.compile(r"model\.layers\.(\d+)\.")  # from num_hidden_layers on: MTP
        mtp = {k for k in load_file(os.path.join(out, "model.safetensors"))
               if (m := number.match(k)) and int(m[1]) >= BASE["num_hidden_layers"]}
        unexpected = {k for k in info["unexpected_keys"]  # it may name experts' tensors as one
                      if not (m := number.match(k)) or int(m[1]) < BASE["num_hidden_layers"]}
        problem = ""
        state = model.state_dict()  # 0 shared experts are empty tensors there and none here
        info["missing_keys"] = [k for k in info["missing_keys"] if state[k].numel()]
        for what in ("missing_keys", "mismatched_keys", "error_msgs"):
            if info.get(what):
                problem = f"{what} {sorted(info[what])[:2]}"
        if unexpected:
            problem = f"unexpected_keys {sorted(unexpected)[:2]}"
        here, error = logits_here(out), relative(logits_there(model), logits_here(out))
        note = f"{len(mtp)} tensors of the MTP layers left out there" if mtp else ""
        report("trained here, " + name, problem or over(error), error, note)
        model.save_pretrained(again)
        error = relative(logits_here(again), here)
        report("  and saved again there", over(error), error)


def random_there(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        **{**BASE, **changes}, attn_implementation="eager"))
    with torch.no_grad():  # zeros and ones say little
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                x.add_(0.2 * torch.randn_like(x))
            if name.endswith("e_score_correction_bias"):
                x.add_(0.1 * torch.randn_like(x))
    if dtype != torch.float32:
        with tempfile.TemporaryDirectory() as work:  # what stays float32 is transformers' to say
            model.config.dtype = dtype
            model.save_pretrained(work)
            name = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
            model = DeepseekV3ForCausalLM.from_pretrained(
                work, attn_implementation="eager", **{name: dtype})
    return model


def saved_there(name, dtype=torch.float32, shard="5GB", **changes):
    with tempfile.TemporaryDirectory() as work:
        model = random_there(dtype, **changes)
        model.save_pretrained(work, max_shard_size=shard)
        files = sorted(glob.glob(os.path.join(work, "*.safetensors")))
        types = {str(x.dtype)[6:] for f in files for x in load_file(f).values()}
        error = relative(logits_here(work), logits_there(model))
        problem = over(error)
        if str(dtype)[6:] not in types or (len(files) > 1) != (shard != "5GB"):
            problem = f"saved as {types} in {len(files)} files"
        report("saved there, " + name, problem, error, f"{len(files)} files" * (len(files) > 1))


@contextlib.contextmanager
def dropped_groups(model, fill, seen):
    """The router with `fill` (None: as it is) for the experts of dropped groups."""
    plain, inside = torch.Tensor.masked_fill, []

    def masked_fill(x, mask, value):
        if inside and mask.dtype == torch.bool and mask.shape[-1] == model.config.n_routed_experts:
            seen.add(float(value))
            value = value if fill is None else fill
        return plain(x, mask, value)

    hooks = []
    for layer in model.model.layers[model.config.first_k_dense_replace:]:
        hooks.append(layer.mlp.register_forward_pre_hook(lambda *_: inside.append(1)))
        hooks.append(layer.mlp.register_forward_hook(lambda *_: inside.clear()))
    torch.Tensor.masked_fill = masked_fill
    try:
        yield
    finally:
        torch.Tensor.masked_fill = plain
        for hook in hooks:
            hook.remove()


def groups_dropped():
    """Where affinity plus bias is negative throughout, an expert at 0.0 wins over any other."""
    model, seen = random_there(**GROUPS), set()
    for name, x in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            x.sub_(2)
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        here = logits_here(work)
    error = {}
    for fill in (None, float("-inf"), 0.0):
        with dropped_groups(model, fill, seen):
            error[fill] = relative(here, logits_there(model))
    says = f"transformers {transformers.__version__} has {seen}, error {error[None]:.1e}"
    report("all choices negative, dropped groups -inf there", over(error[float("-inf")]),
           error[float("-inf")], says)
    report("all choices negative, dropped groups 0.0 there",
           "" if error[0.0] > 1e-3 else "makes no difference", error[0.0], "differs, as it must")


def refused(name, says, **changes):
    """What config.json says otherwise than this program does it."""
    with tempfile.TemporaryDirectory() as work:
        random_there().save_pretrained(work)
        path = os.path.join(work, "config.json")
        with open(path) as f:
            config = json.load(f)
        for key, value in changes.items():
            config[key] = {**config.get(key, {}), **value} if type(value) is dict else value
        with open(path, "w") as f:
            json.dump(config, f)
        result = moe("check", "--model", work, "--data", DATA, "--batch", B, "--seq", T)
        problem = "" if result.returncode == 2 and says in result.stderr else "is not refused"
        report("refused, " + name, problem, None, result.stderr.strip().split(": ", 2)[-1])


def run(case, name, *words, **changes):
    try:
        case(name, *words, **changes) if name else case()
    except Exception as e:  # a case that cannot be run has failed, and the next one is due
        report(f"{case.__name__} {name}", f"{type(e).__name__}: {e}")


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--moe", default=os.path.join(ROOT, "moe"))
args = parser.parse_args()
args.moe = os.path.abspath(args.moe)
torch.set_num_threads(1)
warnings.filterwarnings("ignore", "Initializing zero-element")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

run(trained_here, "q_lora_rank null", q_lora_rank=None)
run(trained_here, "latent queries, MTP", num_nextn_predict_layers=1)
run(trained_here, "groups, rms_norm_eps 1e-3", **GROUPS, rms_norm_eps=1e-3)
run(trained_here, "YaRN, rope_theta 500", **YARN, rope_theta=500)
run(trained_here, "YaRN, groups, 2 MTP layers, 2 shared experts, weights not normed", **YARN,
    **GROUPS, num_nextn_predict_layers=2, n_shared_experts=2, norm_topk_prob=False,
    routed_scaling_factor=1)
run(trained_here, "no routed experts", n_routed_experts=0)
run(trained_here, "no shared experts", n_shared_experts=0)
run(saved_there, "float32")
run(saved_there, "q_lora_rank null, rope_theta 500", q_lora_rank=None, rope_theta=500.0)
run(saved_there, "YaRN, groups, rms_norm_eps 1e-3", **YARN, **GROUPS, rms_norm_eps=1e-3)
run(saved_there, "says 1 MTP layer, has none", num_nextn_predict_layers=1)
run(saved_there, "no shared experts", n_shared_experts=0)
run(saved_there, "bfloat16", torch.bfloat16, **GROUPS)
run(saved_there, "sharded", shard="60KB", **GROUPS)
run(saved_there, "bfloat16, sharded", torch.bfloat16, shard="60KB", **YARN)
run(groups_dropped, "")
run(refused, "rotation by halves", "rope_interleave is false", rope_interleave=False)
run(refused, "linear scaling", "rope_type is linear",
    rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4), rope_scaling=None)
run(refused, "a YaRN key more", "attention_factor is not known", rope_parameters=dict(
    rope_type="yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.5),
    rope_scaling=None)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
