import torch, mllm_efficient as me, pytest, copy, pickle, accelerate, peft, traceback
from accelerate import Accelerator
from accelerate.state import AcceleratorState
def host(name, m, tmp):
    if name=="peft":
        torch.manual_seed(0)
        return peft.get_peft_model(m, peft.LoraConfig(r=2,target_modules=["q_proj","v_proj"],init_lora_weights=False,modules_to_save=["multi_modal_projector"]))
    if name=="cpu": return accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    if name=="disk": return accelerate.disk_offload(m, str(tmp), execution_device=torch.device("cpu"))
    if name=="dispatch": return accelerate.dispatch_model(m, {"model.vision_tower":"disk","model.multi_modal_projector":"cpu","model.language_model":"disk","lm_head":"cpu"}, main_device="cpu", offload_dir=str(tmp), force_hooks=True)
    if name=="bf16": 
        return Accelerator(mixed_precision="bf16",cpu=True).prepare(m)
    return m
@pytest.mark.parametrize("name",["plain","peft","cpu","disk","dispatch","bf16"])
@pytest.mark.parametrize("ran",[0,1])
def test_pl(make_llava, make_batch,name,tmp_path,ran):
    b=make_batch("one image","long text")
    h=host(name,make_llava(),tmp_path)
    print("\n==",name,"ran",ran, type(h).__name__)
    if ran:
        with torch.no_grad():
            a=h(**b).logits; g=h.generate(**b,max_new_tokens=4)
    for what,f in (("deepcopy",copy.deepcopy),("pickle",lambda x: pickle.loads(pickle.dumps(x)))):
        try:
            c=f(h)
            with torch.no_grad():
                o=c(**b); x=c.generate(**b,max_new_tokens=4)
            print(what,"ok", torch.equal(o.logits,a) if ran else "", torch.equal(x,g) if ran else "")
        except BaseException as e: print(what, type(e), str(e)[:200])
    AcceleratorState._reset_state(True)
