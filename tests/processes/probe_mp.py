import jax, time, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
def run():
    out={}
    devs=jax.devices(); mesh=Mesh(np.array(devs),("d",))
    sub=Mesh(np.array([d for d in devs if d.process_index==0]),("d",))
    s=NamedSharding(mesh,P("d")); r=NamedSharding(mesh,P())
    x=jax.make_array_from_callback((8,4),s,lambda i:np.ones((8,4),np.float32)[i],dtype=np.float32)
    key=jax.random.fold_in(jax.random.key(0),3)
    f=jax.jit(lambda x,n,k:(x+n+jax.random.uniform(k,(4,)))*2,out_shardings=s)
    try:
        y=f(x,np.ones((4,),np.float32),key); out["numpy+key"]=float(np.asarray(y.addressable_shards[0].data)[0,0])
    except Exception as e: out["numpy+key"]=str(e)[:300]
    # scalar op result
    try:
        z=jnp.zeros((8,),jnp.float32,device=s); out["zeros"]=str(z.shape)
    except Exception as e: out["zeros"]=str(e)[:200]
    t=time.time()
    big=jax.jit(lambda x: [jnp.sin(x@x.T)@x for _ in range(3)],out_shardings=NamedSharding(sub,P("d")))
    xs=NamedSharding(sub,P("d"))
    here=jax.process_index()==0
    xx=jax.make_array_from_callback((8,4),xs,lambda i:np.ones((8,4),np.float32)[i],dtype=np.float32)
    q=big(xx); jax.block_until_ready(q); out["sub jit s"]=time.time()-t; out["shards"]=len(q[0].addressable_shards)
    t=time.time(); 
    for _ in range(100): q=big(xx)
    jax.block_until_ready(q); out["100 sub jit s"]=time.time()-t
    try:
        k=jax.jit(lambda x,k:x+jax.random.uniform(k,(4,)))(xx,key); out["subkey"]=len(k.addressable_shards)
    except Exception as e: out["subkey"]=str(e)[:300]
    try:
        ph=jax.device_put(xx, xs.with_memory_kind("pinned_host")); out["ph"]=str(ph.sharding.memory_kind)
    except Exception as e: out["ph"]=str(e)[:300]
    out["ids"]=[d.id for d in devs]
    return out
