-- purpose:    which prompts become images
-- reads:      key, prompt, image_draw
-- returns:    shard, row, uid, key, prompt, draw
-- parameters: $draw
select shard, row, uid, key, prompt,
       coalesce(image_draw, 0) + $draw as draw      -- the sample's drawing as it is, or the next
from samples
where prompt is not null
