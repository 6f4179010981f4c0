-- purpose:    which prompts become images, with the originals' sizes: for size_by = "aspect"
-- reads:      key, prompt, image_draw, source_width, source_height
-- returns:    shard, row, uid, key, prompt, draw, width, height
-- parameters: $draw
select shard, row, uid, key, prompt,
       coalesce(image_draw + $draw, 0) as draw,  -- the sample's drawing as it is, or the next; the first is 0
       source_width as width,
       source_height as height
from samples
where prompt is not null
