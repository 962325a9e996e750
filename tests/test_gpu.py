"`make gpu` itself: what it says where there is no GPU, and that a test which crashes, hangs or isn't reached costs no other its result"
import importlib.util,json,shutil,subprocess,sys
from pathlib import Path
import pytest
from conftest import has_gpu

here = Path(__file__).parent

def test_without_a_gpu(tmp_path):
    "one sentence, no error, nothing written"
    if has_gpu(): pytest.skip('there is a GPU')
    r = subprocess.run([sys.executable,'-W','ignore',here/'gpu.py','--out',tmp_path/'gpu.json'], capture_output=True, text=True)
    assert r.returncode==0 and 'There is no GPU here' in r.stdout and len(r.stdout.splitlines())==1 and not r.stderr and not list(tmp_path.iterdir()), r.stdout+r.stderr

def runner(folder, tests):
    "The runner, beside these tests instead of its own"
    folder.mkdir(); shutil.copy(here/'gpu.py', folder); (folder/'test_cuda.py').write_text('import os,sys,time,pytest\n'+tests)
    spec = importlib.util.spec_from_file_location('gpu', folder/'gpu.py'); gpu = importlib.util.module_from_spec(spec); spec.loader.exec_module(gpu)
    return gpu

on_cpu = "@pytest.mark.parametrize('device', ['cpu'])\n"

@pytest.mark.slow
def test_outcomes(tmp_path):
    "each test has its outcome, its message and its figures, those after one that crashes or hangs too"
    tests = ''.join(on_cpu+f'def test_{k}(device, record_property): {v}\n' for k,v in dict(passes="record_property('figure', 3)", fails="assert 1==2, 'as it should'", skips="pytest.skip('no second GPU')",
        crashes='os._exit(9)', after='pass', hangs='time.sleep(60)', last='pass').items())
    gpu = runner(tmp_path/'tests', tests)
    res = {o['test'].split('::test_')[1].split('[')[0]:o for o in gpu.all_tests(gpu.Log(tmp_path/'log'), 'cpu', 60, silence=6)}
    assert {k:o['outcome'] for k,o in res.items()}==dict(passes='passed', fails='failed', skips='skipped', crashes='crashed', after='passed', hangs='hangs', last='passed')
    assert res['passes']['figures']=={'figure':3} and 'as it should' in res['fails']['message'] and 'no second GPU' in res['skips']['message']

@pytest.mark.slow
def test_time_is_up(tmp_path):
    "tests that weren't reached are listed as not run"
    gpu = runner(tmp_path/'tests', ''.join(on_cpu+f'def test_{k}(device): {v}\n' for k,v in dict(first='pass', long='time.sleep(60)', late='pass').items()))
    res = gpu.all_tests(gpu.Log(tmp_path/'log'), 'cpu', 6)
    assert [o['outcome'] for o in res]==['passed','not run','not run'] and 'time was up' in res[2]['message']
