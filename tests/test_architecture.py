"""The rules that keep the package small: who may import whom, how long things are, what they are called."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_moe
from hf_moe.lazy import MODEL_TYPES

ROOT = Path(hf_moe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAY_IMPORT = {  # package -> packages of ours it may import
    "modeling": set(),
    "architectures": {"modeling"},
    "published": {"modeling", "architectures"},
    "conversion": {"modeling", "architectures", "training", "hub"},
    "tuning": {"modeling"},
    "training": {"modeling"},
    "inference": {"modeling"},
    "analysis": {"modeling"},
    "hub": {"modeling", "architectures", "published", "analysis"},
    "cli": {
        *{"modeling", "architectures", "published", "conversion", "tuning", "training", "inference", "analysis", "hub"}
    },
    "testing": {"modeling", "architectures"},
    "api": {"modeling", "architectures", "published", "hub", "tuning"},
    "lazy": set(),
}
LEVELS = [  # inside modeling: a module imports lower levels only
    {
        *{"layers", "cache", "context", "packing", "ops", "losses", "controllers", "parts", "feature_maps"},
        *{"generation", "native_layouts", "divergence", "code_files", "jetmoe", "empty", "forecasting"},
    },
    {"routers", "experts"},
    {"mixers"},
    {"feed_forwards"},
    {"blocks"},
    {"configuration"},
    {"model", "anatomy"},
    {"multi_token_prediction", "router_calls", "counting"},
    {"expert_counts"},
    {"host"},
]
TABLES = {
    "mixers": hf_moe.MIXERS,
    "routers": hf_moe.ROUTERS,
    "experts": hf_moe.EXPERTS,
    "feed_forwards": hf_moe.FEED_FORWARDS,
    "blocks": hf_moe.BLOCKS,
}
PARTS = [(folder, name) for folder, table in TABLES.items() for name in table]
ALL_PARTS = [part for table in TABLES.values() for part in table.values()]
LONGEST = {"modeling/model.py": 300, "parts": 150, "any": 500}


def relative_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Targets of the relative imports of a file, as paths from the package root."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*base, *name.split("."))


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "__init__.py"], ids=identity)
def test_imports_stay_inside_the_boundaries(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    targets = {target[0] for target in relative_imports(path)}
    assert targets <= {package} | MAY_IMPORT[package], targets


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").rglob("*.py")), ids=identity)
def test_modeling_imports_downwards(path):
    if path == ROOT / "modeling" / "__init__.py":
        pytest.skip("the package's table of contents")
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    own = path.relative_to(ROOT / "modeling").parts[0].removesuffix(".py")
    imported = {target[1] for target in relative_imports(path)}
    assert all(name == own or level[name] < level[own] or (level[own] == 0 == level[name]) for name in imported)


@pytest.mark.parametrize("library,home", [("peft", "tuning"), ("trl", "training")])
def test_a_library_has_one_home(library, home):
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            at_home = path.relative_to(ROOT).parts[0] == home
            assert at_home or library not in {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_files_are_short(path):
    name, length = identity(path), len(path.read_text().splitlines())
    is_part = path.parent.name in TABLES and path.parent.parent.name == "modeling"
    assert length <= LONGEST.get(name, LONGEST["parts"] if is_part else LONGEST["any"])


@pytest.mark.parametrize("folder,name", PARTS)
def test_one_name_everywhere(folder, name):
    part = TABLES[folder][name]
    # a name that stands in two tables tells its classes apart: Mlp, MlpExperts
    elsewhere = any(name in table for other, table in TABLES.items() if other != folder)
    names = {name, f"{name}_{folder}"} if elsewhere else {name}
    assert re.sub(r"(?<!^)(?=[A-Z])", "_", part.__name__).lower() in names
    assert part.__module__ == f"hf_moe.modeling.{folder}.{name}"
    assert sys.modules[part.__module__].__doc__ and part.__doc__


@pytest.mark.parametrize("part", ALL_PARTS, ids=lambda part: part.__name__)
def test_a_signature_is_a_json_schema(part):
    for parameter in inspect.signature(part).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.annotation is not parameter.empty, parameter
            if parameter.default is not parameter.empty:
                json.dumps(parameter.default)


def test_every_public_thing_has_a_docstring():
    missing = [
        f"{identity(path)}:{node.name}"
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing


def test_top_level_names_are_unique():
    """So that an architecture can be written as one file."""
    definitions = (ast.ClassDef, ast.FunctionDef)
    files = [*(ROOT / "modeling").rglob("*.py"), *(ROOT / "architectures").rglob("*.py")]
    names = Counter(
        node.name for p in files for node in ast.parse(p.read_text()).body if isinstance(node, definitions)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_no_model_type_is_taken_from_transformers():
    assert not set(hf_moe.ARCHITECTURES) & set(CONFIG_MAPPING_NAMES)
    assert all(config.model_type == name for name, (config, *_) in hf_moe.ARCHITECTURES.items())


def test_import_is_lazy():
    """`import hf_moe` needs torch and transformers; everything else waits until it is used."""
    lazy = [
        "peft",
        "trl",
        "datasets",
        "matplotlib",
        "typer",
        "rich.table",
        "fla",
        "flash_attn",
    ]
    code = f"import sys, hf_moe; print([name for name in {lazy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_the_package_imports_no_classes():
    """They come with the first use: by type, by name, or by one of our own packages."""
    assert set(hf_moe.ARCHITECTURES) | set(hf_moe.PUBLISHED) == MODEL_TYPES
    heavy = (
        "[name for name in sys.modules if name.startswith('hf_moe.modeling') or name == 'transformers.modeling_utils']"
    )
    steps = f"""
import sys, hf_moe
assert not {heavy}, {heavy}
from transformers import AutoConfig
assert AutoConfig.for_model("bam").num_experts and {heavy}
from transformers import AutoModelForCausalLM
assert hf_moe.BamForCausalLM in AutoModelForCausalLM._model_mapping.values()
"""
    subprocess.run([sys.executable, "-c", steps], check=True)
