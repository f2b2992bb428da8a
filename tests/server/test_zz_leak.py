import gc, sys, types, weakref
from tests.server.support import serve
def chain(obj, depth=0, seen=None, maxd=9):
    seen = seen if seen is not None else set()
    if depth>maxd: return
    for r in gc.get_referrers(obj):
        if id(r) in seen or isinstance(r, types.FrameType) and r.f_code.co_name in('chain',): continue
        seen.add(id(r))
        if isinstance(r,list) and len(r)>5000: continue
        desc = f"{type(r).__module__}.{type(r).__name__}"
        if isinstance(r, types.FrameType): desc += f" {r.f_code.co_filename}:{r.f_lineno} {r.f_code.co_name}"
        elif isinstance(r, dict): desc += f" keys={list(r)[:6]}"
        else:
            try: desc += " "+repr(r)[:100].replace("\n"," ")
            except Exception: pass
        print("  "*depth+desc)
        if depth<maxd and len(seen)<3000: chain(r, depth+1, seen, maxd)
def test_leak(house, folders, tmp_path):
    model = str(folders["qwen3"])
    with serve(tmp_path, no_model=True) as s:
        s.post({"model_id": model}, "/models/load")
        s.chat(model, max_tokens=3, savepoints=[{"name":"a","selector":"resid_post[*]"}])
        ref = weakref.ref(s.loaded(model).model.module)
        s.post({"model_id": model}, "/models/unload")
        gc.collect()
        if ref() is not None:
            chain(ref(), maxd=6)
        assert ref() is None
import pytest
from tests.server.test_models import _load, _save
@pytest.fixture
def empty(tmp_path):
    with serve(tmp_path, no_model=True) as served:
        yield served
def test_leak2(house, empty, folders):
    model = str(folders["qwen3"])
    size = _load(empty, model).json()["memory_bytes"]
    empty.chat(model, max_tokens=3, savepoints=_save("resid_post[*]"))
    module = weakref.ref(empty.loaded(model).model.module)
    assert module() is not None
    answer = empty.post({"model_id": model}, "/models/unload")
    gc.collect()
    if module() is not None: chain(module(), maxd=5)
    assert module() is None
def test_leak3(house, empty, folders):
    from tests.server.support import Served
    model = str(folders["qwen3"])
    size = _load(empty, model).json()["memory_bytes"]
    empty.chat(model, max_tokens=3, savepoints=_save("resid_post[*]"))
    module = weakref.ref(empty.loaded(model).model.module)
    assert module() is not None
    answer = empty.post({"model_id": model}, "/models/unload")
    assert answer.json() == {"ok": True, "model": model, "bytes_freed": size}
    gc.collect()
    if module() is not None: chain(module(), maxd=5)
    assert module() is None
