-- purpose:    which prompts become images, with the originals' sizes: for size_by = "aspect"
-- reads:      key, prompt, image_draw, generate_status, source_width, source_height
-- returns:    shard, row, uid, key, prompt, draw, width, height
-- parameters: $draw
select shard, row, uid, key, prompt,
       -- the sample's present drawing, or the next one; the first is 0, the next after a failure 1
       coalesce(image_draw + $draw, case generate_status when 'failed' then $draw end, 0) as draw,
       source_width as width,
       source_height as height
from samples
where prompt is not null
